"""A user's own accelerate config: what of it counts, and what is refused because accelerate would ignore it."""

from pathlib import Path

import pytest
import yaml

from sft_dist.accelerate_config import default_path, read_accelerate_config
from sft_dist.errors import ConfigError


def write(directory: Path, **keys: object) -> Path:
    path = directory / "mine.yaml"
    path.write_text(yaml.safe_dump({"distributed_type": "MULTI_GPU"} | keys))
    return path


def test_the_default_is_where_accelerate_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    from accelerate.commands.config import config_args

    for environ in ({"HF_HOME": str(tmp_path)}, {"XDG_CACHE_HOME": str(tmp_path / "x")}, {}):
        with monkeypatch.context() as patch:
            for name in ("HF_HOME", "XDG_CACHE_HOME"):
                patch.delenv(name, raising=False)
            for name, value in environ.items():
                patch.setenv(name, value)
            assert str(default_path()) == importlib.reload(config_args).default_yaml_config_file
    importlib.reload(config_args)


def test_what_accelerate_config_default_writes_is_understood(tmp_path: Path) -> None:
    from accelerate.commands.config.default import write_basic_config

    path = tmp_path / "default_config.yaml"
    write_basic_config(save_location=str(path))
    found = read_accelerate_config(path)
    assert (found.num_hosts, found.main_host, found.engine) == (1, None, None)


def test_counts_are_of_all_hosts_together(tmp_path: Path) -> None:
    found = read_accelerate_config(write(tmp_path, num_machines=2, num_processes=8, machine_rank=1))
    assert (found.processes_per_host, found.num_hosts, found.host_index) == (4, 2, 1)
    assert read_accelerate_config(write(tmp_path, num_processes=-1)).processes_per_host is None


@pytest.mark.parametrize(
    ("stage", "offload", "engine"), [(2, None, "zero2"), (3, "none", "zero3"), (2, "cpu", "zero2_offload")]
)
def test_deepspeed_names_an_engine(tmp_path: Path, stage: int, offload: str | None, engine: str) -> None:
    deepspeed = {"zero_stage": stage, "offload_optimizer_device": offload}
    path = write(tmp_path, distributed_type="DEEPSPEED", num_processes=2, deepspeed_config=deepspeed)
    assert read_accelerate_config(path).engine == engine


DEEPSPEED = {"distributed_type": "DEEPSPEED", "num_processes": 2}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"distributed_type": "MULTI_CPU", "num_processes": 4},
            "num_processes: 4 with distributed_type: MULTI_CPU starts one",
        ),
        (
            {"distributed_type": False, "num_processes": 4},
            "num_processes: 4 with distributed_type: NO starts one process",
        ),
        ({"num_machines": 2, "num_processes": 5}, "num_processes: 5 on num_machines: 2 starts 4, in silence"),
        ({"num_processes": "many"}, "num_processes: 'many' is no whole number"),
        ({"distributed_type": "MEGATRON_LM"}, "distributed_type: MEGATRON_LM is not what sft_dist trains on"),
        ({"compute_environment": "AMAZON_SAGEMAKER"}, "compute_environment: AMAZON_SAGEMAKER"),
        (
            DEEPSPEED | {"deepspeed_config": {"zero_stage": 1, "offload_optimizer_device": "cpu"}},
            "none of the engines zero1",
        ),
        (
            DEEPSPEED | {"deepspeed_config": {"zero_stage": 3, "offload_optimizer_device": "nvme"}},
            "none of the engines zero1",
        ),
        (
            DEEPSPEED | {"deepspeed_config": {"deepspeed_config_file": "z.json"}},
            "would not be read; name it in the recipe",
        ),
        (DEEPSPEED | {"num_machines": 2, "deepspeed_config": {"zero_stage": 2}}, "deepspeed_multinode_launcher: pdsh"),
    ],
)
def test_what_would_be_ignored_in_silence_is_refused(tmp_path: Path, keys: dict[str, object], message: str) -> None:
    path = write(tmp_path, **keys)
    with pytest.raises(ConfigError) as refused:
        read_accelerate_config(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert message in str(refused.value)


def test_a_file_that_is_no_accelerate_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read as an accelerate config"):
        read_accelerate_config(tmp_path / "none.yaml")
    for text in ("run: {name: a}", "- 1", "{"):
        (tmp_path / "other.yaml").write_text(text)
        with pytest.raises(ConfigError, match="accelerate config"):
            read_accelerate_config(tmp_path / "other.yaml")
