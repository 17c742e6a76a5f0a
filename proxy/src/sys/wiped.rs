//! Memory of secrets whose owner does not wipe it.

use std::mem::{MaybeUninit, needs_drop};

/// A value on the heap, overwritten before its memory is given back. What the stack held of it while it was made is not.
pub struct Wiped<T>(Box<MaybeUninit<T>>);

impl<T> Wiped<T> {
    /// Nothing in it may have a destructor: it would find zeroes.
    const IS_FLAT: () = assert!(!needs_drop::<T>());

    pub fn new(value: T) -> Self {
        let () = Self::IS_FLAT;
        Self(Box::new(MaybeUninit::new(value)))
    }

    #[inline]
    pub fn get(&self) -> &T {
        // SAFETY: `new` alone makes one, with a value, and only `drop` takes it away.
        unsafe { self.0.assume_init_ref() }
    }
}

impl<T> Drop for Wiped<T> {
    fn drop(&mut self) {
        // SAFETY: the memory is this value's own; nothing reads it as a `T` any more, nor has `T` a destructor.
        unsafe { zeroize::zeroize_flat_type(self.0.as_mut_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_in_is_there() {
        let key = Wiped::new([7u8; 32]);
        assert_eq!(key.get(), &[7; 32]);
    }
}
