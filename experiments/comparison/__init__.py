"""Many runs side by side: which stand beside which, with what interval, and what may be said of them."""
