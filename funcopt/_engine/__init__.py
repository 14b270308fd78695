"""What every optimizer that is made by a rule shares: no optimizer and no slot is named here."""
