"""Specs that are refused, and what the API server says of them, word by word.

The tests here compare with our validator, tests/e2e/test_api_server.py with a real API server.
"""

from tests.api.refusals import running, sources, strategy, training
from tests.api.refusals.bounds import BY_BOUND
from tests.api.refusals.refusal import Refusal
from tests.api.refusals.schema import BY_SCHEMA
from tests.api.refusals.unsupported import UNSUPPORTED

BY_RULE = (*sources.BY_RULE, *strategy.BY_RULE, *training.BY_RULE, *running.BY_RULE)
"""Refused by CEL: forms, and pairs that make no sense."""
REFUSALS = (*BY_SCHEMA, *UNSUPPORTED, *BY_RULE)

__all__ = ["BY_BOUND", "BY_RULE", "REFUSALS", "UNSUPPORTED", "Refusal"]
