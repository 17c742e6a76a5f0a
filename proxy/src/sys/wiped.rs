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
        wipe(&mut self.0);
    }
}

fn wipe<T>(value: &mut MaybeUninit<T>) {
    // SAFETY: the memory is this value's own, and a `MaybeUninit` may hold anything: it has no destructor and promises no `T`.
    unsafe { zeroize::zeroize_flat_type(value.as_mut_ptr()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_in_is_there_until_it_is_wiped() {
        let mut key = Wiped::new([7u8; 32]);
        assert_eq!(key.get(), &[7; 32]);
        wipe(&mut key.0);
        assert_eq!(key.get(), &[0; 32]);
    }
}
