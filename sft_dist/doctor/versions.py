"""Versions and ABI of torch, CUDA, NCCL, flash-attn and the rest; each is imported in a process of its own."""

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from sft_dist import __version__
from sft_dist.doctor.finding import Finding, Group
from sft_dist.doctor.probe import Answer, ask_python

GROUP = Group("versions")
IMPORT_S = 120.0
"""Importing torch from a busy network file system can take a minute."""

FLASH = (
    ("flash-attn", "flash_attn", "flash_attn_varlen_func"),
    ("flash-attn-3", "flash_attn_interface", "flash_attn_varlen_func"),
    ("flash-attn-4", "flash_attn.cute", "flash_attn_varlen_func"),
)
"""Package, module, and what attention needs of it."""

BUILT_FOR = re.compile(r"\+cu(?P<cuda>\d+)torch(?P<torch>[\d.]+\d)cxx11abi(?P<abi>TRUE|FALSE)", re.I)
"""The local part of the version of a prebuilt flash-attn wheel."""


def ask_torch() -> Answer:
    """What torch says of itself and the GPUs; its facts are those of `doctor.ask_torch`."""
    return ask_python("doctor.ask_torch", timeout_s=IMPORT_S)


def check_versions(torch: Answer) -> Iterator[Finding]:
    """torch: its answer to `ask_torch`."""
    yield GROUP.ok("python", f"{platform.python_version()} at {sys.executable}")
    yield from _requirements()
    if torch.failure:
        yield GROUP.problem(
            "torch",
            f"cannot be imported: {torch.failure}",
            "install it anew into this environment, with the command of the README, and leave PYTHONPATH and "
            "LD_LIBRARY_PATH unset",
        )
    else:
        yield from torch_findings(torch.facts)
    for package, module, attribute in FLASH:
        yield from _flash(package, module, attribute, torch.facts)
    yield from _deepspeed()


def _requirements() -> Iterator[Finding]:
    """What the package says it needs, against what is installed."""
    try:
        stated = importlib.metadata.requires("sft-dist") or []
    except importlib.metadata.PackageNotFoundError:
        yield GROUP.note("sft-dist", f"{__version__}, run from a directory without being installed", "pip install -e .")
        return
    needed = [r for r in map(_requirement, stated) if r and (r.marker is None or r.marker.evaluate({"extra": ""}))]
    versions = {each.name: _version(each.name) for each in needed}
    wrong = [
        f"{each.name} {versions[each.name] or 'is missing'} (needs {each.specifier})"
        for each in needed
        if not (version := versions[each.name]) or not each.specifier.contains(version, prereleases=True)
    ]
    if wrong:
        yield GROUP.problem(
            "packages", "; ".join(wrong), "pip install -c constraints.txt -e . in the directory of sft_dist"
        )
    shown = ("transformers", "accelerate", "deepspeed", "datasets", "tokenizers")
    named = ", ".join(f"{name} {versions[name]}" for name in shown if versions.get(name))
    yield GROUP.ok("sft-dist", f"{__version__}, with {named}")


def _requirement(text: str) -> Requirement | None:
    try:
        return Requirement(text)
    except InvalidRequirement:
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_findings(facts: Mapping[str, Any]) -> Iterator[Finding]:
    """Build, ABI and collectives, from the facts of `doctor.ask_torch`."""
    built = f"CUDA {facts['cuda']}" if facts["cuda"] else f"ROCm {facts['hip']}" if facts["hip"] else "CPUs only"
    abi = "new" if facts["cxx11_abi"] else "old"
    yield GROUP.ok("torch", f"{facts['version']}, built for {built}, with the {abi} C++11 ABI")
    if not facts["distributed"]:
        yield GROUP.problem(
            "torch.distributed", "this build of torch has none", "install a build from PyTorch's own index"
        )
    if facts["nccl"]:
        cudnn = f", cuDNN {facts['cudnn']}" if facts["cudnn"] else ""
        yield GROUP.ok("NCCL", f"{'.'.join(map(str, facts['nccl']))}, the one that torch brings{cudnn}")


def _flash(package: str, module: str, attribute: str, torch: Mapping[str, Any]) -> Iterator[Finding]:
    if find_spec(module.partition(".")[0]) is None:
        if package == "flash-attn":
            yield GROUP.ok(package, "not installed; torch's own flash kernels (torch_varlen) are used instead")
        return
    answer = ask_python("doctor.ask_package", module, attribute, timeout_s=IMPORT_S)
    if "." in module and f"No module named '{module}" in answer.failure:
        return  # versions 2 and 4 share a name; this one is not installed
    yield flash_finding(package, answer, version=_version(package), torch=torch)


def flash_finding(package: str, answer: Answer, *, version: str | None, torch: Mapping[str, Any]) -> Finding:
    """What became of importing it, and for which torch it was built where its version says so."""
    mismatch = _built_for_another(version or "", torch)
    mend = f"pip uninstall {package}: torch_varlen is as exact and needs no package; or build it again for this torch"
    if answer.failure:
        # auto imports it on a GPU: an ImportError makes it take the next, a death takes the run with it.
        dies = answer.code is None or answer.code < 0
        make = GROUP.problem if dies and torch.get("devices") else GROUP.warning
        built = f" ({version} is {mismatch})" if mismatch else ""
        return make(package, f"cannot be imported: {answer.failure}{built}", mend)
    if not answer.facts.get("has_attribute", True):
        return GROUP.warning(package, "is there, but has no flash_attn_varlen_func", mend)
    if mismatch:
        return GROUP.warning(package, f"{version} can be imported, but is {mismatch}", mend)
    return GROUP.ok(package, f"{version or answer.facts.get('version')}")


def _built_for_another(version: str, torch: Mapping[str, Any]) -> str:
    """Which torch a prebuilt wheel is for, in words, where it is not this one; else empty."""
    built = BUILT_FOR.search(version)
    if not built or not torch:
        return ""
    own = ".".join(str(torch["version"]).split(".")[:2])
    differences = []
    if own != ".".join(built["torch"].split(".")[:2]):
        differences.append(f"torch {built['torch']}")
    if bool(torch["cxx11_abi"]) != (built["abi"].upper() == "TRUE"):
        differences.append(f"the {'new' if built['abi'].upper() == 'TRUE' else 'old'} C++11 ABI")
    if torch["cuda"] and not str(torch["cuda"]).replace(".", "").startswith(built["cuda"][:2]):
        differences.append(f"CUDA {built['cuda']}")
    return f"built for {' and '.join(differences)}" if differences else ""


def _deepspeed() -> Iterator[Finding]:
    if find_spec("deepspeed") is None:
        yield GROUP.note("deepspeed", "not installed; the zero engines cannot be used", "pip install deepspeed")
        return
    answer = ask_python(
        "doctor.ask_package", "deepspeed", timeout_s=IMPORT_S, environ={"DS_ACCELERATOR": "cpu"} | os.environ
    )
    if answer.failure:
        yield GROUP.problem(
            "deepspeed",
            f"cannot be imported: {answer.failure}",
            "the zero engines will not run: install it anew, or use train.engine: ddp",
        )
    else:
        yield GROUP.ok("deepspeed", f"{answer.facts.get('version')} can be imported")
