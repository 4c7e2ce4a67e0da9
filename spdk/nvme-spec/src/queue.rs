//! What only controllers reached through memory have: queue creation, doorbells and their shadow (Base sections 3.1.2.1,
//! 3.3.1, 5.2).

use bitfield_struct::bitfield;

/// The first doorbell: that of submission queue 0 (Base section 3.1.4, "Controller Properties"; PCIe transport).
pub const DOORBELL_BASE: u32 = 0x1000;

/// Offset of a queue's submission tail doorbell, with CAP.DSTRD.
#[must_use]
pub const fn sq_tail_doorbell(qid: u16, dstrd: u8) -> u32 {
    DOORBELL_BASE + 2 * (qid as u32) * (4 << (dstrd & 0xF))
}

/// Offset of a queue's completion head doorbell, with CAP.DSTRD.
#[must_use]
pub const fn cq_head_doorbell(qid: u16, dstrd: u8) -> u32 {
    DOORBELL_BASE + (2 * (qid as u32) + 1) * (4 << (dstrd & 0xF))
}

/// CDW10 of Create I/O Submission Queue and Create I/O Completion Queue (Base sections 5.2.1, 5.2.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct CreateQueueCdw10 {
    /// QID.
    pub qid: u16,
    /// QSIZE: entries, zero-based.
    pub qsize_z: u16,
}

/// CDW11 of Create I/O Completion Queue (Base section 5.2.1).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct CreateCqCdw11 {
    /// PC: physically contiguous.
    pub pc: bool,
    /// IEN: interrupts enabled.
    pub ien: bool,
    #[bits(14)]
    __: u16,
    /// IV: interrupt vector.
    pub iv: u16,
}

/// CDW11 of Create I/O Submission Queue (Base section 5.2.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct CreateSqCdw11 {
    /// PC: physically contiguous.
    pub pc: bool,
    /// QPRIO: priority class, with weighted round robin.
    #[bits(2)]
    pub qprio: u8,
    #[bits(13)]
    __: u16,
    /// CQID: the completion queue it posts to.
    pub cqid: u16,
}

/// CDW11 of Set Features, and DW0 of its completion, for Number of Queues (Base section 5.2.25.1.7).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct NumberOfQueues {
    /// NSQR or NSQA: submission queues, zero-based.
    pub nsq_z: u16,
    /// NCQR or NCQA: completion queues, zero-based.
    pub ncq_z: u16,
}

/// CDW10 of Get Log Page (Base section 5.1.12).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct GetLogCdw10 {
    /// LID.
    pub lid: u8,
    /// LSP: log specific.
    #[bits(7)]
    pub lsp: u8,
    /// RAE: retain asynchronous event.
    pub rae: bool,
    /// NUMDL: dwords, zero-based, low half.
    pub numdl_z: u16,
}

/// CDW10 of Abort (Base section 5.1.1).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct AbortCdw10 {
    /// SQID.
    pub sqid: u16,
    /// CID.
    pub cid: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doorbells_lie_where_the_stride_says() {
        assert_eq!(sq_tail_doorbell(0, 0), 0x1000);
        assert_eq!(cq_head_doorbell(0, 0), 0x1004);
        assert_eq!(sq_tail_doorbell(3, 0), 0x1018);
        assert_eq!(cq_head_doorbell(1, 4), 0x1000 + 3 * 64);
    }

    #[test]
    fn dwords_have_their_bits_in_place() {
        assert_eq!(CreateQueueCdw10::new().with_qid(2).with_qsize_z(0x3F).into_bits(), 0x003F_0002);
        assert_eq!(CreateCqCdw11::new().with_pc(true).with_ien(true).with_iv(5).into_bits(), 0x0005_0003);
        assert_eq!(CreateSqCdw11::new().with_pc(true).with_cqid(2).into_bits(), 0x0002_0001);
        assert_eq!(GetLogCdw10::new().with_lid(2).with_numdl_z(127).into_bits(), 0x007F_0002);
        assert_eq!(AbortCdw10::new().with_sqid(1).with_cid(9).into_bits(), 0x0009_0001);
        assert_eq!(NumberOfQueues::from_bits(0x0003_0001).ncq_z(), 3);
    }
}
