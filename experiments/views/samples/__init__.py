"""How a deployment of any module is shown: lines for a terminal, pictures, one page, TensorBoard."""
