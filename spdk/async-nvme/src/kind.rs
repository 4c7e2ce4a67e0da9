//! Operations on their way through a queue pair: one byte for the kind, so that whatever depends on it is a look-up.

use nvme_spec::nvm::IoCdw12;

use crate::op::{OpKind, RawCommand};

/// [`OpKind`] without what differs from one operation to the next. The plain ones come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Read,
    Write,
    Compare,
    Verify,
    WriteZeroes,
    Flush,
    Deallocate,
    Copy,
    DatasetManagement,
    Raw,
}

impl Kind {
    pub(crate) const ALL: [Self; 10] = [
        Self::Read,
        Self::Write,
        Self::Compare,
        Self::Verify,
        Self::WriteZeroes,
        Self::Flush,
        Self::Deallocate,
        Self::Copy,
        Self::DatasetManagement,
        Self::Raw,
    ];

    /// Whether its commands are a range of blocks in CDW10 to CDW12, and nothing else.
    #[inline]
    pub(crate) const fn is_plain(self) -> bool {
        self as u8 <= Self::WriteZeroes as u8
    }

    /// Whether its blocks are data in the operation's buffer.
    #[inline]
    pub(crate) const fn moves_blocks(self) -> bool {
        self as u8 <= Self::Compare as u8
    }

    /// Whether the buffer of the operation is the data of its commands.
    #[inline]
    pub(crate) const fn moves_data(self) -> bool {
        self.moves_blocks() || matches!(self, Self::DatasetManagement | Self::Raw)
    }
}

/// What a plain operation is, as a queue pair keeps it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plain {
    pub(crate) kind: Kind,
    /// Bits of CDW12 beside the number of blocks.
    pub(crate) cdw12: u32,
}

impl Plain {
    /// Of any operation; of one that is not plain only its kind.
    #[inline]
    pub(crate) const fn of(kind: Kind, op: &OpKind) -> Self {
        let cdw12 = match op {
            OpKind::Write { fua } => IoCdw12::new().with_fua(*fua).into_bits(),
            OpKind::WriteZeroes { deallocate, fua } => {
                IoCdw12::new().with_fua(*fua).with_deac(*deallocate).into_bits()
            }
            _ => 0,
        };
        Self { kind, cdw12 }
    }

    /// What the caller asked for; `special` when that is not plain.
    pub(crate) const fn op_kind(self, special: OpKind) -> OpKind {
        let cdw12 = IoCdw12::from_bits(self.cdw12);
        match self.kind {
            Kind::Read => OpKind::Read,
            Kind::Write => OpKind::Write { fua: cdw12.fua() },
            Kind::Compare => OpKind::Compare,
            Kind::Verify => OpKind::Verify,
            Kind::WriteZeroes => OpKind::WriteZeroes { deallocate: cdw12.deac(), fua: cdw12.fua() },
            Kind::Flush | Kind::Deallocate | Kind::Copy | Kind::DatasetManagement | Kind::Raw => special,
        }
    }
}

impl OpKind {
    #[inline]
    pub(crate) const fn kind(&self) -> Kind {
        match self {
            Self::Read => Kind::Read,
            Self::Write { .. } => Kind::Write,
            Self::Compare => Kind::Compare,
            Self::Verify => Kind::Verify,
            Self::WriteZeroes { .. } => Kind::WriteZeroes,
            Self::Flush => Kind::Flush,
            Self::Deallocate => Kind::Deallocate,
            Self::Copy { .. } => Kind::Copy,
            Self::DatasetManagement { .. } => Kind::DatasetManagement,
            Self::Raw(_) => Kind::Raw,
        }
    }
}

/// CDW10 to CDW15 as the last three words of a command.
pub(crate) fn last_words(raw: &RawCommand) -> [u64; 3] {
    let [a, b, c, d, e, f] = raw.cdw10_15.map(u64::from);
    [a | b << 32, c | d << 32, e | f << 32]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_what_was_asked_for() {
        let raw = RawCommand { opcode: 0x81, cdw10_15: [1, 2, 3, 4, 5, 6] };
        let all = [
            OpKind::Read,
            OpKind::Write { fua: true },
            OpKind::Write { fua: false },
            OpKind::Compare,
            OpKind::Raw(raw),
            OpKind::Verify,
            OpKind::WriteZeroes { deallocate: true, fua: false },
            OpKind::WriteZeroes { deallocate: false, fua: true },
            OpKind::Copy { to: 77, fua: true },
            OpKind::Flush,
            OpKind::Deallocate,
            OpKind::DatasetManagement { attributes: 5 },
        ];
        for op in all {
            let plain = Plain::of(op.kind(), &op);
            // Whatever is left there of an operation before.
            let special = if op.kind().is_plain() { OpKind::Copy { to: 1, fua: true } } else { op };
            assert_eq!(plain.op_kind(special), op);
        }
        for (index, kind) in Kind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, index);
        }
    }
}
