"""Every published method as scope x bound x form, one line each."""
