"""What programs and devices cost: products, traffic, published figures."""
