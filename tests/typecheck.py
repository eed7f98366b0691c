"""The type checker of the test run: beartype, with int accepted where float is annotated (PEP 484)."""

from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
