"""How large a norm may be."""
