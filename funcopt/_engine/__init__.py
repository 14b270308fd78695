"""From trees to kernels, for every optimizer alike: none of them, and no slot, is named here."""
