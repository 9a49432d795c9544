"""Errors of the kernels. Users of lq_graph get a LinearQuantValueError with the operator's name and
the same text; a kernel does not know the operator's name."""

from __future__ import annotations

__all__ = ["NotFiniteError", "OperandError", "PartialGroupError", "ShortStorageError"]


class OperandError(ValueError):
    """A kernel cannot read what it was given.

    Attributes:
        argument: its name.
        problem: what is wrong with it.
        todo: what to do.
    """

    def __init__(self, argument: str, problem: str, todo: str) -> None:
        super().__init__(f"{problem}. What to do: {todo}")
        self.argument, self.problem, self.todo = argument, problem, todo


class NotFiniteError(OperandError):
    """A packed scale holds infinity or NaN."""

    def __init__(self) -> None:
        super().__init__(
            "scale",
            "the packed scale holds NaN or infinity; what the chip makes of them is not published, "
            "so it is not computed here",
            "check the calibration that produced the scale.",
        )


class ShortStorageError(OperandError):
    """A tensor's storage is shorter than the tensor. untyped_storage().resize_ makes such tensors;
    FSDP frees parameters with it.

    Attributes:
        shape: of the tensor.
        needed, held: bytes that the shape needs, and that the storage holds.
    """

    def __init__(self, argument: str, shape: tuple[int, ...], needed: int, held: int) -> None:
        super().__init__(
            argument,
            f"{argument} has shape {shape} and needs {needed} bytes of memory; its storage holds "
            f"{held}",
            "make it whole first; its owner has freed it (FSDP does between forwards), or called "
            "untyped_storage().resize_.",
        )
        self.shape, self.needed, self.held = shape, needed, held


class PartialGroupError(OperandError):
    """k int4 values do not fill int32 words.

    Attributes:
        k: number of values.
        group: values in a word.
    """

    def __init__(self, k: int, group: int) -> None:
        super().__init__(
            "k",
            f"k is {k}; an int32 holds {group} int4 values, so k must be a multiple of {group}",
            "pad k with zeros in x1 and weight alike.",
        )
        self.k, self.group = k, group
