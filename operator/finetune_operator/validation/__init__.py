"""The API server's judgement without an API server: schema, defaults and CEL rules of the CRD, in the same words.

The CRD built from the types is the only source; nothing here repeats a rule.
"""

from finetune_operator.validation.admission import admit
from finetune_operator.validation.document import line_of, validate, validate_update
from finetune_operator.validation.problems import Problem

__all__ = ["Problem", "admit", "line_of", "validate", "validate_update"]
