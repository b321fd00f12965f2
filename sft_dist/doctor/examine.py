"""All that the doctor looks at, in order; nothing that is broken here keeps it from looking at the rest."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from sft_dist.config import Recipe, load_recipe
from sft_dist.doctor.environment import check_environment
from sft_dist.doctor.finding import Finding, Group
from sft_dist.doctor.gpus import check_gpus
from sft_dist.doctor.host import check_host
from sft_dist.doctor.network import check_network
from sft_dist.doctor.places import check_places
from sft_dist.doctor.recipe import Needs, ask_training, check_recipe, needs_of, training_findings
from sft_dist.doctor.trial import try_all_reduce, try_smoke_run
from sft_dist.doctor.versions import ask_torch, check_versions
from sft_dist.errors import SftDistError

Say = Callable[[str], None]


def examine(
    recipe_path: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    quick: bool = False,
    offline: bool = False,
    say: Say = lambda _: None,
) -> list[Finding]:
    """Everything that was found. quick: without the trials. offline: without requests. say: told what is being done."""
    recipe, findings = _load(recipe_path, overrides)
    needs = needs_of(recipe) if recipe else Needs(None, None)
    is_here = needs.num_parameters is not None  # else its config cannot be asked; the recipe's group says so
    words = [str(recipe_path), *overrides] if is_here else []
    say("versions, GPUs, attention")
    torch, training = ask_torch(), ask_training(words)
    num_gpus = sum("error" not in device for device in torch.facts.get("devices", []))
    group = Group("recipe") if is_here else Group("attention")
    findings += _safely("versions", check_versions(torch))
    gpus = list(_safely("GPUs", check_gpus(torch)))
    findings += gpus
    findings += _safely("attention", training_findings(training, group))
    if recipe:
        findings += _safely("recipe", check_recipe(recipe, needs))
    say("host, disk, environment")
    has_gpus = bool(num_gpus) or any(finding.name.startswith("GPU ") for finding in gpus)
    findings += _safely("host", check_host(has_gpus=has_gpus))
    run_dir = recipe.run.dir if recipe else Path("runs")
    findings += _safely("disk", check_places(run_dir=run_dir, num_checkpoint_bytes=needs.num_bytes))
    findings += _safely("environment", check_environment(has_gpus=has_gpus))
    if not offline:
        say("network")
        wants_wandb = recipe is not None and recipe.wandb is not None and recipe.wandb.mode == "online"
        findings += _safely("network", check_network(wants_wandb=wants_wandb))
    if not quick and not torch.failure:
        findings += _safely("trial", _trials(recipe, num_gpus=num_gpus, say=say))
    return findings


def _trials(recipe: Recipe | None, *, num_gpus: int, say: Say) -> Iterator[Finding]:
    try:
        say("an all-reduce over two processes")
        yield try_all_reduce(num_gpus=num_gpus)
        say("three steps of a tiny model")
        yield try_smoke_run(num_gpus=num_gpus, engine=recipe.train.engine if recipe else "auto")
    except OSError as error:
        seen = f"no temporary directory to try in: {error}"
        yield Group("trial").problem("temporary", seen, "set TMPDIR to a directory that can be written, with room")


def _load(path: Path | None, overrides: Sequence[str]) -> tuple[Recipe | None, list[Finding]]:
    if path is None:
        return None, []
    try:
        return load_recipe(path, overrides), []
    except SftDistError as error:
        mend = "sft-dist config recipe.yaml prints what it resolves to; the rest was looked at without it"
        return None, [Group("recipe").problem("recipe", str(error), mend)]


def _safely(group: str, findings: Iterable[Finding]) -> list[Finding]:
    """Those that could be made: a machine may be broken in ways that nobody thought of, and the rest is still told."""
    made: list[Finding] = []
    try:
        made.extend(findings)
    except Exception as error:  # the one place where carrying on is the purpose
        text = f"could not be looked at: {type(error).__name__}: {error}"
        made.append(Group(group).warning("doctor", text, "this is a fault of the doctor's; the rest was looked at"))
    return made
