"""The gate on any module of yours: attach, its layers and choices, callbacks for two trainers."""
