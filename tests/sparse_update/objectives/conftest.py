from __future__ import annotations

import pytest

from tests.sparse_update.parallel.pool import Pool


@pytest.fixture(scope="package")
def two(tmp_path_factory):
    pool = Pool(2, tmp_path_factory.mktemp("two"))
    yield pool
    pool.close()


@pytest.fixture(scope="package")
def four(tmp_path_factory):
    pool = Pool(4, tmp_path_factory.mktemp("four"))
    yield pool
    pool.close()
