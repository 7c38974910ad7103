"""Networks: plain pytrees of parameters in, arrays out."""
