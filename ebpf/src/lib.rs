//! Types that the eBPF programs and the proxy share: the layout of the pinned maps.
