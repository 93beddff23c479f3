//! What is measured about a tensor, and where: sites and statistics.
