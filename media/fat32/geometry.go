package fat32

import (
	"fmt"
	"math"
	"sort"
)

const (
	// A volume is FAT32 by its number of clusters and by nothing else
	// (fatgen103, "FAT Type Determination").
	minClusters = 65525
	maxClusters = 0x0ffffff5 // the last cluster is then 0x0ffffff6; 0x0ffffff7 marks a bad one

	maxSectors     = math.MaxUint32 // BPB_TotSec32
	maxClusterSize = 32 << 10       // bytes; more is not portable

	minReserved = 32 // sectors before the first FAT, as every FAT32 formatter has them
	firstData   = 2  // the number of the first cluster
)

// geometry is where things lie on a volume.
type geometry struct {
	sector     int64 // bytes
	cluster    int64 // bytes
	clusters   int64 // how many
	reserved   int64 // sectors before the first FAT
	fatSectors int64 // of each of the two FATs
}

// newGeometry lays out a volume of exactly that many clusters. The reserved
// area grows until the data starts on a multiple of the cluster size, so that
// no cluster straddles two of the medium's own blocks.
func newGeometry(sector, cluster, clusters int64) geometry {
	g := geometry{sector: sector, cluster: cluster, clusters: clusters}
	g.fatSectors = ceil((clusters+firstData)*4, sector)
	perCluster := cluster / sector
	g.reserved = ceil(minReserved+2*g.fatSectors, perCluster)*perCluster - 2*g.fatSectors
	return g
}

// sectors is the volume's size; it grows with the number of clusters.
func (g geometry) sectors() int64 {
	return g.reserved + 2*g.fatSectors + g.clusters*(g.cluster/g.sector)
}

// offset is where a cluster begins, in bytes.
func (g geometry) offset(cluster int64) int64 {
	return (g.reserved+2*g.fatSectors)*g.sector + (cluster-firstData)*g.cluster
}

// largestGeometry is the layout with the most clusters in that many sectors.
// What then remains behind the last cluster belongs to no file and is not
// counted in the volume: were it counted, a driver could compute one cluster
// more than the FAT has entries.
func largestGeometry(sector, cluster, sectors int64) geometry {
	n := sort.Search(maxClusters+1, func(n int) bool {
		return newGeometry(sector, cluster, int64(n)).sectors() > sectors
	}) - 1
	return newGeometry(sector, cluster, max(0, int64(n)))
}

// fit chooses the cluster size: the one that drivers expect for a volume of
// size bytes, or else the nearest with which there are enough clusters for
// FAT32 and for the tree.
func (t *tree) fit(sector, size int64) (geometry, error) {
	for _, cluster := range clusterSizes(sector, size) {
		g := largestGeometry(sector, cluster, size/sector)
		if g.clusters >= max(minClusters, t.clusters(cluster)) {
			return g, nil
		}
	}
	need, err := t.minSize(sector)
	if err != nil {
		return geometry{}, err
	}
	return geometry{}, &NoSpaceError{Need: need, Have: size}
}

func (t *tree) minSize(sector int64) (int64, error) {
	least := int64(math.MaxInt64)
	for _, cluster := range clusterSizes(sector, 0) {
		n := max(minClusters, t.clusters(cluster))
		if s := newGeometry(sector, cluster, n).sectors(); n <= maxClusters && s <= maxSectors {
			least = min(least, s*sector)
		}
	}
	if least == math.MaxInt64 {
		return 0, fmt.Errorf("FAT32: these files are more than FAT32 can hold on a disk with %d-byte sectors: leave some out", sector)
	}
	return least, nil
}

// clusterSizes lists all cluster sizes in bytes, the best for the volume first:
// Microsoft's default for large volumes (4 KiB up to 8 GiB, 32 KiB above
// 32 GiB), then smaller ones, then larger ones.
func clusterSizes(sector, size int64) []int64 {
	best := int64(4 << 10)
	for best < maxClusterSize && size > best<<21 {
		best *= 2
	}
	var list []int64
	for c := best; c >= sector; c /= 2 {
		list = append(list, c)
	}
	for c := best * 2; c <= maxClusterSize; c *= 2 {
		list = append(list, c)
	}
	return list
}

func ceil(n, unit int64) int64 { return (n + unit - 1) / unit }
