"""What other libraries need beyond the one line of `gradkeel.attach`; each module imports its library."""
