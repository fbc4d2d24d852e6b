"""The methods under test, one file each: every concrete class here that derives from `Method` is in the registry."""
