from __future__ import annotations

from tests.scheduling.conftest import a_request, sequences_of

from fastserve.scheduling.block_pool import ROOT_HASH, hash_block, private_root_hash
from fastserve.scheduling.sequence import ScheduledSequence, StepPlan


def test_what_it_counts() -> None:
    [sequence] = sequences_of(a_request("r", [1, 2, 3]))
    sequence.token_ids += [4, 5]
    assert (sequence.num_prompt_tokens, sequence.num_tokens, sequence.num_generated_tokens) == (3, 5, 2)


def test_siblings_grow_apart() -> None:
    first, second = sequences_of(a_request("r", [1, 2], n=2))
    first.token_ids.append(3)
    assert (second.token_ids, second.index, second.view.index) == ([1, 2], 1, 1)
    assert first != second


def test_full_blocks_are_hashed_once_each_and_chained() -> None:
    [sequence] = sequences_of(a_request("r", [1, 2, 3, 4, 5]))
    sequence.hash_full_blocks(2)
    first = hash_block(ROOT_HASH, [1, 2])
    assert sequence.block_hashes == [first, hash_block(first, [3, 4])]
    sequence.block_hashes[0] = b"kept"
    sequence.token_ids.append(6)
    sequence.hash_full_blocks(2)
    assert sequence.block_hashes[0] == b"kept"
    assert sequence.block_hashes[2] == hash_block(sequence.block_hashes[1], [5, 6])


def test_a_part_of_a_block_has_a_hash_of_its_own() -> None:
    [sequence] = sequences_of(a_request("r", [1, 2, 3, 4]))
    sequence.hash_full_blocks(2)
    part = sequence.hash_tokens(1, 2, 1)
    assert part == hash_block(sequence.block_hashes[0], [3])
    assert part not in sequence.block_hashes


def test_a_root_of_its_own_shares_no_hash() -> None:
    shared, own = sequences_of(a_request("r", [1, 2, 3, 4], n=2))
    own.root_hash = private_root_hash("r", 1)
    for sequence in (shared, own):
        sequence.hash_full_blocks(2)
    assert not set(shared.block_hashes) & set(own.block_hashes)


def test_the_last_chunk_reaches_the_last_token() -> None:
    [sequence] = sequences_of(a_request("r", [1, 2, 3]))
    sequence.num_computed_tokens = 1
    chunks = [ScheduledSequence(sequence, 1), ScheduledSequence(sequence, 2)]
    assert [chunk.is_last_chunk for chunk in chunks] == [False, True]
    assert StepPlan(chunks, []).num_tokens == 3
