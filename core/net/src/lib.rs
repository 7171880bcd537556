//! Bridge, taps, addresses and firewall.
