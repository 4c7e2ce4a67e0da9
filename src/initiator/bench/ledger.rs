//! What must be on the media after a run: the tables of all workers, for whoever reads the blocks by another way.

use super::Geometry;
use super::verify::Table;
use crate::units::{ByteLen, ByteOffset};

/// Faults told in words.
const FAULTS_TOLD_MAX: usize = 16;

/// What a run wrote: for each unit the generation that was acknowledged last, and those nobody knows about.
#[derive(Debug)]
pub struct Ledger {
    geometry: Geometry,
    /// The first unit of each worker, and what its units must hold.
    shares: Vec<(u64, Table)>,
}

/// What [`Ledger::audit`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    /// Units with an acknowledged write, all of which were read.
    pub units_checked: u64,
    /// Units with a block that is not what it must be.
    pub faults: u64,
    /// The first of these in words.
    pub first_faults: Vec<String>,
}

impl Ledger {
    pub(super) const fn new(geometry: Geometry, shares: Vec<(u64, Table)>) -> Self {
        Self { geometry, shares }
    }

    /// Bytes of a unit.
    #[must_use]
    pub fn unit_len(&self) -> ByteLen {
        let block = u64::from(self.geometry.block_size.bytes());
        ByteLen(u64::from(self.geometry.blocks_per_unit) * block)
    }

    /// Reads each unit that has an acknowledged write with `read`, which fills the whole buffer from a byte offset of
    /// the namespace, and checks every block: whole, in its place, of the acknowledged generation or, where a later
    /// write was never answered, of that one.
    ///
    /// # Errors
    /// The first of `read`.
    pub fn audit<E>(
        &mut self,
        mut read: impl FnMut(ByteOffset, &mut [u8]) -> Result<(), E>,
    ) -> Result<Audit, E> {
        let mut audit = Audit::default();
        let mut data = vec![0; usize::try_from(self.unit_len().get()).unwrap_or(usize::MAX)];
        for (first, table) in &mut self.shares {
            for unit in 0..table.len() {
                if !table.is_known(unit) {
                    continue;
                }
                let lba = self.geometry.lba_of(*first + unit);
                read(ByteOffset(lba.get() * u64::from(self.geometry.block_size.bytes())), &mut data)?;
                audit.units_checked += 1;
                if let Err((lba, fault)) = table.check(unit, &data, lba) {
                    audit.faults += 1;
                    if audit.first_faults.len() < FAULTS_TOLD_MAX {
                        audit.first_faults.push(format!("block {lba}: {fault}"));
                    }
                }
            }
        }
        Ok(audit)
    }
}
