package ondisk

// Append writes the superblock behind b, without MetaboxNid and what follows it unless there are ExtSlots.
func (s Super) Append(b []byte) []byte {
	b = le.AppendUint32(b, s.Magic)
	b = le.AppendUint32(b, s.Checksum)
	b = le.AppendUint32(b, s.FeatureCompat)
	b = append(b, s.BlkSzBits, s.ExtSlots)
	b = le.AppendUint16(b, s.RootNid2b)
	b = le.AppendUint64(b, s.Inos)
	b = le.AppendUint64(b, uint64(s.Epoch))
	b = le.AppendUint32(b, s.FixedNsec)
	b = le.AppendUint32(b, s.BlocksLo)
	b = le.AppendUint32(b, s.MetaBlkaddr)
	b = le.AppendUint32(b, s.XattrBlkaddr)
	b = append(b, s.UUID[:]...)
	b = append(b, s.VolumeName[:]...)
	b = le.AppendUint32(b, s.FeatureIncompat)
	b = le.AppendUint16(b, s.ComprAlgs)
	b = le.AppendUint16(b, s.ExtraDevices)
	b = le.AppendUint16(b, s.DevtSlotOff)
	b = append(b, s.DirBlkBits, s.XattrPrefixCount)
	b = le.AppendUint32(b, s.XattrPrefixStart)
	b = le.AppendUint64(b, s.PackedNid)
	b = append(b, s.XattrFilterReserved, s.IsharePrefixID)
	b = append(b, s.Reserved1[:]...)
	b = le.AppendUint32(b, s.BuildTime)
	b = le.AppendUint64(b, s.RootNid8b)
	b = append(b, s.Reserved2[:]...)
	if s.ExtSlots == 0 {
		return b
	}
	b = le.AppendUint64(b, s.MetaboxNid)
	return append(b, s.Reserved3[:]...)
}

// Append writes the inode behind b.
func (d InodeCompact) Append(b []byte) []byte {
	b = le.AppendUint16(b, d.Format)
	b = le.AppendUint16(b, d.XattrIcount)
	b = le.AppendUint16(b, d.Mode)
	b = le.AppendUint16(b, d.Nb)
	b = le.AppendUint32(b, d.Size)
	b = le.AppendUint32(b, d.Mtime)
	b = le.AppendUint32(b, d.U)
	b = le.AppendUint32(b, d.Ino)
	b = le.AppendUint16(b, d.UID)
	b = le.AppendUint16(b, d.GID)
	return le.AppendUint32(b, d.Reserved)
}

// Append writes the inode behind b.
func (d InodeExtended) Append(b []byte) []byte {
	b = le.AppendUint16(b, d.Format)
	b = le.AppendUint16(b, d.XattrIcount)
	b = le.AppendUint16(b, d.Mode)
	b = le.AppendUint16(b, d.Nb)
	b = le.AppendUint64(b, d.Size)
	b = le.AppendUint32(b, d.U)
	b = le.AppendUint32(b, d.Ino)
	b = le.AppendUint32(b, d.UID)
	b = le.AppendUint32(b, d.GID)
	b = le.AppendUint64(b, uint64(d.Mtime))
	b = le.AppendUint32(b, d.MtimeNsec)
	b = le.AppendUint32(b, d.Nlink)
	return append(b, d.Reserved[:]...)
}

// Append writes the entry behind b.
func (d Dirent) Append(b []byte) []byte {
	b = le.AppendUint64(b, d.Nid)
	b = le.AppendUint16(b, d.NameOff)
	return append(b, d.FileType, d.Reserved)
}

// Append writes the header behind b.
func (d XattrHeader) Append(b []byte) []byte {
	b = le.AppendUint32(b, d.NameFilter)
	b = append(b, d.SharedCount)
	return append(b, d.Reserved[:]...)
}

// Append writes the entry behind b.
func (d XattrEntry) Append(b []byte) []byte {
	return le.AppendUint16(append(b, d.NameLen, d.NameIndex), d.ValueSize)
}

// Append writes the header behind b.
func (d MapHeader) Append(b []byte) []byte {
	b = le.AppendUint32(b, d.Lo)
	return append(le.AppendUint16(b, d.Advise), d.AlgorithmType, d.ClusterBits)
}

// Append writes the entry behind b.
func (d LclusterIndex) Append(b []byte) []byte {
	b = le.AppendUint16(b, d.Advise)
	b = le.AppendUint16(b, d.ClusterOfs)
	return le.AppendUint32(b, d.U)
}

// Append writes the entry behind b.
func (d ChunkIndex) Append(b []byte) []byte {
	b = le.AppendUint16(b, d.StartBlkHi)
	b = le.AppendUint16(b, d.DeviceID)
	return le.AppendUint32(b, d.StartBlkLo)
}
