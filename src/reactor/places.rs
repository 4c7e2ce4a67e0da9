//! A list whose places are made beforehand, and filled where they lie.
//!
//! ```text
//!   taken          free
//!   [ a | b | c ]  [ old | old | old ]      next(): the first that is free, for the caller to write field by field
//! ```
//!
//! To push a value of several words onto a `Vec` the compiler builds it elsewhere, in pieces, and copies it whole right after. A load is
//! not answered from two stores that are still under way: the copy waits until they are through, some 20 cycles, for each command
//! of each list. Fields that are written to their place have nothing to wait for.
//!
//! Not here: what a place still holds when it is given back. Who keeps buffers in it takes them out.

/// The list.
#[derive(Debug)]
pub(super) struct Places<T> {
    /// All there are, taken or free.
    all: Vec<T>,
    taken: usize,
}

impl<T> Default for Places<T> {
    fn default() -> Self {
        Self { all: Vec::new(), taken: 0 }
    }
}

impl<T> Places<T> {
    /// Makes room for so many at least, those that are taken included. What was never taken takes no memory yet.
    pub(super) fn reserve(&mut self, total: usize) {
        self.all.reserve(total.saturating_sub(self.all.len()));
    }

    /// Takes the next place, with whatever was left there, or for the first time `vacant`; `None` when all that there is room for are taken.
    #[inline(always)]
    pub(super) fn next(&mut self, vacant: fn() -> T) -> Option<&mut T> {
        if self.taken == self.all.len() && !self.make(vacant) {
            return None;
        }
        let place = self.all.get_mut(self.taken)?;
        self.taken += 1;
        Some(place)
    }

    #[cold]
    fn make(&mut self, vacant: fn() -> T) -> bool {
        let has_room = self.all.len() < self.all.capacity();
        if has_room {
            self.all.push(vacant());
        }
        has_room
    }

    /// How many are taken.
    #[inline]
    pub(super) const fn len(&self) -> usize {
        self.taken
    }

    /// Whether none is taken.
    #[inline]
    pub(super) const fn is_empty(&self) -> bool {
        self.taken == 0
    }

    /// Those that are taken, in the order in which they were.
    #[inline]
    pub(super) fn as_mut_slice(&mut self) -> &mut [T] {
        self.all.get_mut(..self.taken).unwrap_or_default()
    }

    /// The same places, none of which is taken any more. By value, so that who keeps them stores them once.
    #[inline]
    pub(super) fn emptied(self) -> Self {
        Self { all: self.all, taken: 0 }
    }

    /// Those that are taken.
    #[cfg(test)]
    pub(super) fn into_vec(mut self) -> Vec<T> {
        self.all.truncate(self.taken);
        self.all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_taken_in_order_and_come_again() {
        let mut list = Places::default();
        assert_eq!(list.next(|| 0), None);
        list.reserve(2);
        let room = list.all.capacity();
        for value in 0..room {
            *list.next(|| 100).expect("a place") += value;
        }
        assert_eq!(list.next(|| 0), None, "all are taken");
        assert_eq!((list.len(), list.as_mut_slice().first()), (room, Some(&100)));
        list.reserve(1);
        assert_eq!((list.len(), list.all.capacity()), (room, room), "none is lost, nor made");
        list.reserve(room + 1);
        assert_eq!(list.next(|| 9), Some(&mut 9));
        let mut list = list.emptied();
        assert!(list.is_empty() && list.as_mut_slice().is_empty());
        assert_eq!(list.next(|| 0), Some(&mut 100), "as it was left");
        assert_eq!(list.into_vec(), [100]);
    }
}
