"""Events to joules: counts, profiles of constants, the account, break-even, published networks."""
