from tests.e2e.conftest import toy, toy_model

__all__ = ["toy", "toy_model"]
