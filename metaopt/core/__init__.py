"""The thin layer: stages whose inner loops `higher` unrolls, chained, and the one backward."""
