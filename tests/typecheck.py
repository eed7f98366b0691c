"""Types and shapes of the library, checked at every call of the test run.

Beartype checks types, with int accepted where float is annotated (PEP 484). Jaxtyping adds shapes, but binds the
arguments of every call to a signature, which costs more than most functions do: it sees only what has shapes.
"""

import ast
import dataclasses
import functools
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, config, jaxtyped

PACKAGE = "pyro_elbo"
_typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
_SWITCH = compile(  # under the name of beartype's own wrappers, which no error blames
    "def call(*args, **kwargs): return (plain if config.jaxtyping_disable else checking)(*args, **kwargs)",
    "<@beartype switch>",
    "exec",
)


def checked(x: Any) -> Any:
    """Check the calls of a function, or of a dataclass's ``__init__``."""
    if isinstance(x, type):
        if dataclasses.is_dataclass(x) and "__init__" in vars(x):
            x.__init__ = checked(x.__init__)
        return x
    if any(map(_needs_jaxtyping, x.__annotations__.values())):
        return jaxtyped(x, typechecker=_typechecker)
    names = {"config": config, "plain": x, "checking": _typechecker(x)}
    exec(_SWITCH, names)
    return functools.wraps(x)(names["call"])


def _needs_jaxtyping(annotation: Any) -> bool:
    """Return whether an annotation holds a shape, or a name that is not imported while the library runs."""
    shape = isinstance(annotation, str) or (isinstance(annotation, type) and issubclass(annotation, AbstractArray))
    return shape or any(map(_needs_jaxtyping, get_args(annotation)))


class _Decorate(ast.NodeTransformer):
    """Decorates functions, methods and classes, but no functions in functions: every call would decorate them anew."""

    def visit_Module(self, node: ast.Module) -> ast.Module:
        self.generic_visit(node)
        documented = ast.get_docstring(node, clean=False) is not None
        node.body.insert(int(documented), ast.parse("from tests.typecheck import checked as _checked").body[0])
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        node.decorator_list.insert(0, ast.Name("_checked", ast.Load()))  # applied after @dataclass
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.decorator_list.append(ast.Name("_checked", ast.Load()))
        return node


class _Loader(SourceFileLoader):
    """Compiles decorated source, and keeps its byte code beside that of the plain source."""

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> Any:
        tree = ast.fix_missing_locations(_Decorate().visit(ast.parse(data, path)))
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimize)

    def get_data(self, path: str) -> bytes:
        return super().get_data(path.replace(".pyc", ".checked.pyc"))

    def set_data(self, path: str, data: Any, **options: Any) -> None:
        super().set_data(path.replace(".pyc", ".checked.pyc"), data, **options)


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin)
        return spec


def install() -> None:
    """Check every module of the library that is imported from now on."""
    sys.meta_path.insert(0, _Finder())
