"""Which large tensors does some code make?"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """Notes each operation that makes a tensor of so many numbers or more, whatever its shape and
    dtype. One that returns a view of its input, or the input itself, makes none. What the kernel of
    an operation such as logsumexp needs while it runs is not seen."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers = numbers
        self.made = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for alias, tensor in zip(operation._schema.returns, self.tensors_in(result)):
            if alias.alias_info is None and tensor.numel() >= self.numbers:
                self.made.append(f"{operation.__name__} {tuple(tensor.shape)}")
        return result

    @staticmethod
    def tensors_in(result):
        results = result if isinstance(result, (tuple, list)) else [result]
        return [x for x in results if isinstance(x, torch.Tensor)]
