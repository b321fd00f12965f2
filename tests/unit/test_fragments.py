"""What any layout wrote, any other layout reads, element by element."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_dist.engine import fragments
from sft_dist.engine.fragments import (
    KINDS,
    Fragment,
    Snapshot,
    adamw_state,
    read_fragments,
    require_shapes,
    share_of,
    write_fragments,
)
from sft_dist.errors import CheckpointError

SIZES = {"a.weight": 12, "b.bias": 1, "c/with/slashes": 7}


def whole(sizes: dict[str, int] = SIZES, *, filled: bool = True) -> list[Fragment]:
    """Every parameter in one piece; every element of every kind is another number."""
    made, number = [], 1
    for name, numel in sizes.items():
        tensors = {}
        for kind in KINDS:
            tensors[kind] = torch.arange(number, number + numel).float() if filled else torch.zeros(numel)
            number += numel
        made.append(Fragment(name, 0, tensors))
    return made


def write(directory: Path, *, world_size: int, sizes: dict[str, int] = SIZES) -> list[Path]:
    files = [directory / f"rank-{rank:05d}.safetensors" for rank in range(world_size)]
    for rank, file in enumerate(files):
        write_fragments(share_of(whole(sizes), rank=rank, world_size=world_size), file)
    return files


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 12))
def test_shares_cover_every_element_once_and_are_equal_to_one_element(sizes: list[int], world_size: int) -> None:
    everything = whole({f"p{index}": numel for index, numel in enumerate(sizes)})
    shares = [share_of(everything, rank=rank, world_size=world_size) for rank in range(world_size)]
    for kind in KINDS:
        shared = [fragment.tensors[kind] for share in shares for fragment in share]
        assert torch.cat(shared).equal(torch.cat([fragment.tensors[kind] for fragment in everything]))
    counts = [sum(fragment.numel for fragment in share) for share in shares]
    assert max(counts) - min(counts) <= 1


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    writers=st.integers(1, 5),
    readers=st.integers(1, 5),
    block=st.integers(1, 8),
)
def test_any_number_of_ranks_reads_what_any_number_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], writers: int, readers: int, block: int
) -> None:
    monkeypatch.setattr(fragments, "BLOCK_ELEMENTS", block)
    named = {f"p{index}": numel for index, numel in enumerate(sizes)}
    files = write(tmp_path, world_size=writers, sizes=named)
    for rank in range(readers):
        expected = share_of(whole(named), rank=rank, world_size=readers)
        found = share_of(whole(named, filled=False), rank=rank, world_size=readers)
        read_fragments(found, files)
        for a, b in zip(found, expected, strict=True):
            assert all(a.tensors[kind].equal(b.tensors[kind]) for kind in KINDS), (a.name, a.start)


def test_shares_are_views_of_what_is_trained() -> None:
    everything = whole()
    (piece,) = share_of(everything[:1], rank=1, world_size=2)
    piece.tensors["master"].zero_()
    assert everything[0].tensors["master"].tolist() == [1, 2, 3, 4, 5, 6] + [0] * 6


def test_a_missing_file_is_a_weight_that_is_named_with_its_elements(tmp_path: Path) -> None:
    files = write(tmp_path, world_size=4)  # 20 elements: 5 each
    for lost, said in ((0, "elements 0 to 12"), (1, "elements 5 to 12"), (2, "elements 10 to 12")):
        left = [file for index, file in enumerate(files) if index != lost]
        with pytest.raises(CheckpointError, match=rf"master of a\.weight: {said} are in no file"):
            read_fragments(whole(filled=False), left)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_moment_is_named(tmp_path: Path, kind: str) -> None:
    (file,) = write(tmp_path, world_size=1)
    stored = safetensors.torch.load_file(file)
    del stored[f"{kind}/0/c/with/slashes"]
    safetensors.torch.save_file(stored, file)
    with pytest.raises(CheckpointError, match=rf"{kind} of c/with/slashes: elements 0 to 7 are in no file"):
        read_fragments(whole(filled=False), [file])


@pytest.mark.parametrize("content", [b"", b"\x80\x04\x95garbage", b"\xff" * 64])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (file,) = write(tmp_path, world_size=1)
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: cannot be read"):
        read_fragments(whole(filled=False), [file])


def test_keys_of_another_form_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rank-00000.safetensors"
    safetensors.torch.save_file({"model.embed_tokens.weight": torch.zeros(3)}, file)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_fragments(whole(filled=False), [file])


def test_a_snapshot_keeps_what_was_and_its_buffers() -> None:
    snapshot, everything = Snapshot(), whole()
    first = snapshot.of(everything)
    then = first[0].tensors["exp_avg"].clone()
    everything[0].tensors["exp_avg"].add_(1)
    assert first[0].tensors["exp_avg"].equal(then)
    second = snapshot.of(everything)
    assert second[0].tensors["exp_avg"].equal(then + 1)
    assert second[0].tensors["exp_avg"].data_ptr() == first[0].tensors["exp_avg"].data_ptr()


def test_a_state_made_before_the_first_update_is_what_adamw_makes() -> None:
    """An update from it equals an update of an optimizer that nobody touched."""
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for index, weight in enumerate(weights):
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        if index:
            state = adamw_state(optimizer, weight)
            assert sorted(state) == ["exp_avg", "exp_avg_sq", "step"]
        weight.grad = torch.tensor([1.0, -2.0, 3.0])
        optimizer.step()
    assert weights[0].equal(weights[1])


def test_the_first_weight_of_another_model_is_named() -> None:
    require_shapes({"w": [2, 3]}, {"w": (2, 3)})  # type: ignore[dict-item]
    for found, expected, said in (
        ({"w": [2, 3]}, {"w": [3, 2]}, r"weight w: \[2, 3\] in the checkpoint, \[3, 2\] in the model"),
        ({}, {"w": [3]}, r"weight w: None in the checkpoint, \[3\] in the model"),
        ({"w": [3], "lm_head": [1]}, {"w": [3]}, r"weight lm_head: \[1\] in the checkpoint, None in the model"),
    ):
        with pytest.raises(CheckpointError, match=said):
            require_shapes(found, expected)
