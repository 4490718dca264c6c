"""How results are shown: tables, pictures, one HTML page, TensorBoard."""
