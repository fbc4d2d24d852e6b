"""The paper's sentence on trial: three readings of "with identical memory requirements", each with a verdict."""
