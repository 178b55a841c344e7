//! The keys of a store.

use blake3::Hasher;

/// A key, or a name: 256 bits.
pub(crate) type Bits = [u8; 32];

/// The keys of one namespace of a store. They come from the secret, or from the store's random bytes.
#[derive(Clone)]
pub(crate) struct Keys {
    names: Bits,
    checksums: Bits,
    seals: Bits,
}

impl Keys {
    /// The keys of a namespace. Without a secret, they come from the random bytes of the file alone.
    pub(crate) fn new(secret: Option<&[u8]>, store: &Bits, namespace: &Bits) -> Self {
        let of = |purpose: &'static str| {
            let mut hasher = Hasher::new_derive_key(purpose);
            hasher
                .update(store)
                .update(namespace)
                .update(&[u8::from(secret.is_some())])
                .update(secret.unwrap_or_default());
            *hasher.finalize().as_bytes()
        };
        Self {
            names: of("paged-kv-disk 1 names of blocks"),
            checksums: of("paged-kv-disk 1 checksums of blocks"),
            seals: of("paged-kv-disk 1 keys of salts"),
        }
    }

    /// A hasher for names.
    pub(crate) fn names(&self) -> Hasher {
        Hasher::new_keyed(&self.names)
    }

    /// A hasher for the checksums of plain blocks.
    pub(crate) fn checksums(&self) -> Hasher {
        Hasher::new_keyed(&self.checksums)
    }

    /// A hasher for the keys that blocks under salts are encrypted with.
    pub(crate) fn seals(&self) -> Hasher {
        Hasher::new_keyed(&self.seals)
    }
}
