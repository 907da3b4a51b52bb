"""The list of planted faults follows the code: stale entries show in every run of the tests."""

import re

import pytest

from tests.planted_faults.__main__ import PROJECT, Fault, read_faults

FAULTS = read_faults(())


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_has_its_text_and_its_tests(fault: Fault) -> None:
    assert (PROJECT / fault.file).read_text().count(fault.text) == 1
    assert fault.replacement != fault.text
    for test in fault.tests:
        file, _, name = test.partition("::")
        code = (PROJECT / file).read_text()
        function = name.split("[")[0]
        assert not name or re.search(rf"^def {function}\(", code, re.MULTILINE), test


def test_names_of_faults_are_unique() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
