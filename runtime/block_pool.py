"""Which blocks of a pool are free, how many sequences use each, and which hold a known prompt.

Accounting only: no tensors. A block is in one of three states: in use (by one sequence or more),
idle (by none, but kept because it holds the beginning of a prompt), free. Blocks are taken from the
free ones, then from the idle ones, least recently used first.
What a kept block holds is never written again, so sequences that share one need no copies. The last
block of a prompt is the exception: one user goes on behind it, any other has to copy it.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence


def prompt_keys(
    token_ids: Sequence[int], block_size: int, part: int, salt: str = ""
) -> list[bytes]:
    """The name of each of a prompt's blocks: a hash of the salt, its tokens and all before them.

    Behind the last whole part, keys and values depend on where the prompt ends (see `KVCache`): the
    names of those blocks are of the whole prompt.
    """
    keys, key = [], b""
    if salt:
        key = hashlib.blake2b(salt.encode(errors="surrogatepass"), digest_size=16).digest()
    whole = len(token_ids) // part * part
    for start in range(0, whole, block_size):
        key = _hash(key, token_ids[start : start + block_size])
        keys.append(key)
    end = _hash(key + b"end", token_ids[whole:])
    num_behind = -(-(len(token_ids) - whole) // block_size)
    return keys + [_hash(end, [i]) for i in range(num_behind)]


def _hash(before: bytes, token_ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(before + array("q", token_ids).tobytes(), digest_size=16).digest()


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks))[::-1]
        self._idle: dict[int, None] = {}  # in the order in which they will be taken
        self._uses = [0] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        """Blocks that can be taken."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    @property
    def num_kept(self) -> int:
        """Blocks, in use or idle, that another sequence could share."""
        return len(self._key_of)

    def is_shared(self, block: int) -> bool:
        """Whether more than one sequence uses it."""
        return self._uses[block] > 1

    def take(self, count: int) -> list[int]:
        """So many blocks, for one sequence to write to."""
        assert count <= self.num_available, (count, self.num_available)
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block = next(iter(self._idle))
            del self._idle[block]
            del self._by_key[self._key_of.pop(block)]
        self._uses[block] = 1
        return block

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks kept under these keys, up to the first missing one; each is used once more."""
        found = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            self._idle.pop(block, None)
            self._uses[block] += 1
            found.append(block)
        return found

    def keep(self, block: int, key: bytes) -> None:
        """What the block, in use, holds will not change; of two with one key the first is kept."""
        assert self._uses[block] > 0, "only a block in use can be kept"
        if key not in self._by_key and block not in self._key_of:
            self._by_key[key] = block
            self._key_of[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """One use less of each. A prompt's later blocks are of no use without the earlier ones, so
        they become idle first and are taken first."""
        for block in reversed(blocks):
            self._uses[block] -= 1
            assert self._uses[block] >= 0, "a block was released twice"
            if self._uses[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)
