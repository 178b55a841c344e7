//! Pages whose examples are compiled and run as tests. Not in the packages themselves: an archive of one would not have
//! the pages.

#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../README.md")]
    mod readme {}
    #[doc = include_str!("bitnet-inference.md")]
    mod bitnet_inference {}
    #[doc = include_str!("design.md")]
    mod design {}
    #[doc = include_str!("layout.md")]
    mod layout {}
    #[doc = include_str!("porting.md")]
    mod porting {}
}
