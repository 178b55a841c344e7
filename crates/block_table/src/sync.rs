//! The one switch between what runs and what loom explores.
//!
//! loom does not know the map's locks. In its builds a map with one lock stands in, which is the map at its most
//! contended.

#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU64, Ordering};

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};

#[cfg(not(loom))]
pub(crate) use in_production::Shards;

#[cfg(loom)]
pub(crate) use under_loom::Shards;

#[cfg(not(loom))]
mod in_production {
    use std::hash::Hash;

    use dashmap::DashMap;
    use dashmap::mapref::entry::Entry;

    /// A concurrent map that hands out no entry: what is done to one is done in a closure, under its shard's lock.
    #[derive(Debug)]
    pub(crate) struct Shards<K: Eq + Hash, V>(DashMap<K, V>);

    impl<K: Eq + Hash, V> Shards<K, V> {
        pub(crate) fn new() -> Self {
            Self(DashMap::new())
        }

        pub(crate) fn len(&self) -> usize {
            self.0.len()
        }

        pub(crate) fn insert(&self, key: K, value: V) {
            self.0.insert(key, value);
        }

        /// Exchanges the value of `key` for `value` and returns the old one; `None` if there is no such key.
        pub(crate) fn replace(&self, key: K, value: V) -> Option<V> {
            let mut place = self.0.get_mut(&key)?;
            Some(std::mem::replace(&mut *place, value))
        }

        /// Takes out what `key` has if `may` allows it; says `Err` if it does not, and `None` if there is no such key.
        pub(crate) fn remove_if(&self, key: K, may: impl FnOnce(&V) -> bool) -> Option<Result<V, ()>> {
            match self.0.entry(key) {
                Entry::Vacant(_) => None,
                Entry::Occupied(entry) if may(entry.get()) => Some(Ok(entry.remove())),
                Entry::Occupied(_) => Some(Err(())),
            }
        }
    }
}

#[cfg(loom)]
mod under_loom {
    use std::collections::HashMap;
    use std::hash::Hash;
    use std::sync::PoisonError;

    use loom::sync::{Mutex, MutexGuard};

    #[derive(Debug)]
    pub(crate) struct Shards<K: Eq + Hash, V>(Mutex<HashMap<K, V>>);

    impl<K: Eq + Hash, V> Shards<K, V> {
        pub(crate) fn new() -> Self {
            Self(Mutex::new(HashMap::new()))
        }

        fn map(&self) -> MutexGuard<'_, HashMap<K, V>> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }

        pub(crate) fn len(&self) -> usize {
            self.map().len()
        }

        pub(crate) fn insert(&self, key: K, value: V) {
            self.map().insert(key, value);
        }

        pub(crate) fn replace(&self, key: K, value: V) -> Option<V> {
            self.map().get_mut(&key).map(|place| std::mem::replace(place, value))
        }

        pub(crate) fn remove_if(&self, key: K, may: impl FnOnce(&V) -> bool) -> Option<Result<V, ()>> {
            let mut map = self.map();
            let may = may(map.get(&key)?);
            if may { map.remove(&key).map(Ok) } else { Some(Err(())) }
        }
    }
}
