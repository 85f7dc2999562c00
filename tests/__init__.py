import pytest

# Their assertions explain themselves as those of tests do.
pytest.register_assert_rewrite("tests.cases", "tests.cuda_kernels", "tests.reduced_loss")
