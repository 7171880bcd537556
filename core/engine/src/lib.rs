//! VM lifecycle, effects and their journal, operations.
