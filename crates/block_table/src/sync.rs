//! The synchronisation types, `std`'s and dashmap's or loom's.
//!
//! loom cannot explore dashmap's locks. In loom builds a map with a single loom lock replaces it, which is a dashmap at
//! its highest contention.

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

    /// A concurrent map that hands out no reference to an entry: each operation ends before its shard is unlocked.
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

        /// Replaces the value of `key` and returns the old one; `None` if there is no such key.
        pub(crate) fn replace(&self, key: K, value: V) -> Option<V> {
            let mut entry = self.0.get_mut(&key)?;
            Some(std::mem::replace(&mut *entry, value))
        }

        /// Removes `key` and returns its value if `may` returns true; `Err` if it does not, `None` if there is no such
        /// key.
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
            self.map().get_mut(&key).map(|entry| std::mem::replace(entry, value))
        }

        pub(crate) fn remove_if(&self, key: K, may: impl FnOnce(&V) -> bool) -> Option<Result<V, ()>> {
            let mut map = self.map();
            let may = may(map.get(&key)?);
            if may { map.remove(&key).map(Ok) } else { Some(Err(())) }
        }
    }
}
