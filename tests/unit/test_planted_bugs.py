"""The bugs of `make mutants` fit the code as it is: said here in a second, not there after an hour."""

import re

from tests.mutants import MUTANTS, ROOT, misfit


def test_every_bug_can_be_planted_where_it_says() -> None:
    assert [problem for mutant in MUTANTS if (problem := misfit(mutant, ROOT))] == []


def test_every_bug_names_tests_that_are_there() -> None:
    for mutant in MUTANTS:
        file, *names = mutant.tests.split("::")
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert all(f"def {name.partition('[')[0]}(" in text for name in names), mutant.tests


def test_the_count_that_people_read_is_theirs() -> None:
    said = re.search(r"plants (\d+) bugs", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert said is not None
    assert int(said.group(1)) == len(MUTANTS) == len({mutant.name for mutant in MUTANTS})
