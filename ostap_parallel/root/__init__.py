"""ROOT: what its objects need to travel, and what workers need to use them."""
