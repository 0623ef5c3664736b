"""Competing methods: one file each, with the parts it brings and where they come from."""
