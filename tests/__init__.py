# A package, so that these tests are found before those that other distributions install as `tests` (torch-fidelity).
