"""Failures are printed as they come: who lent the GPU may end the run before pytest sums it up."""

import sys

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        print(f"\n{report.nodeid}: {report.longreprtext}", file=sys.__stdout__, flush=True)
