"""Benchmark suites, run by EleutherAI's lm-evaluation-harness on a loaded model."""

from lola_ft.evaluation.suite.run_suite import SuiteOptions, evaluate_suite

__all__ = ["SuiteOptions", "evaluate_suite"]
