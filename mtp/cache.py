"""Keys and values that attention looks back at while decoding.

Letters: B rows, S slots, G key/value heads, d head width.
"""

from __future__ import annotations

from torch import Tensor

from mtp.decode.contract import Layout


class CacheLayer:
    """Keys and values of one attention layer, (B, S, G, d): it knows slots, neither lengths nor
    positions.
    """

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v
        self.flat_k, self.flat_v = k.flatten(0, 1), v.flatten(0, 1)
        self.all_rows, self.flat = slice(0, len(k)), (-1, *k.shape[2:])

    def write(self, layout: Layout, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new columns; return all columns that the layout may look at."""
        if len(self.k) == 1:  # views cost a batch of one 2 % of its step
            self.k.index_copy_(1, layout.where, k)
            self.v.index_copy_(1, layout.where, v)
            return self.k.narrow(1, 0, layout.span), self.v.narrow(1, 0, layout.span)
        self.flat_k.index_copy_(0, layout.where, k.view(self.flat))
        self.flat_v.index_copy_(0, layout.where, v.view(self.flat))
        if layout.rows == self.all_rows:
            return self.k.narrow(1, 0, layout.span), self.v.narrow(1, 0, layout.span)
        return self.k[layout.rows, : layout.span], self.v[layout.rows, : layout.span]


class Cache:
    """`layers` caches of B rows and S slots in two tensors. Rejected drafts need no clean-up: later
    columns overwrite their slots.
    """

    def __init__(
        self, layers: int, rows: int, slots: int, heads: int, head_dim: int, like: Tensor
    ) -> None:
        self.slots = slots
        self.k, self.v = like.new_zeros(2, layers, rows, slots, heads, head_dim)
        self.layers = [CacheLayer(k, v) for k, v in zip(self.k, self.v, strict=True)]

    def copy(self, source: int, row: int, length: int) -> None:
        """Give `row` the first `length` slots of `source`: one prompt pass serves many samples."""
        for x in (self.k, self.v):
            x[:, row, :length] = x[:, source, :length]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy what lies in flat slots (row * slots + slot) `source` to `target`, all at once."""
        for x in (self.k.flatten(1, 2), self.v.flatten(1, 2)):
            x[:, target] = x[:, source]
